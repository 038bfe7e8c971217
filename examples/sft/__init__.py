"""Instruction tuning of the mini-Moonlight on bytes: chats, training, exact match, and a chat with the served model."""
