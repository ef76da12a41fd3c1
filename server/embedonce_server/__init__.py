"""The server of ``embedonce serve``: one cache behind OpenAI's embeddings endpoint.

It uses public names of embedonce only. pip install 'embedonce[serve]'
"""
