"""A server that speaks OpenAI's protocol: `flashmoe-lab serve`. app.py puts the parts together."""
