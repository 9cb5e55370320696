"""Conversations: their messages, the chat template, and rows of tokens with the answers marked."""
