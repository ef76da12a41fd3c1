"""The form of requests and answers of the endpoint, and the checks that need no model."""
