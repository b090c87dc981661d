"""Chats: the checkpoint's own template, tool calls read from what the model writes, and the
Python functions that such calls run. Knows no engine."""
