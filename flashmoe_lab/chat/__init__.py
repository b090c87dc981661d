"""Chats: the checkpoint's own template, tool calls read from what the model writes, the Python
functions that such calls run, beginnings that were read before, and sessions of turns. Only
session.py and the terminal's commands hold an engine."""
