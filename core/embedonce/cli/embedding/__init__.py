"""The parts of ``embedonce embed``: reading passages, embedding them, and writing the vectors."""
