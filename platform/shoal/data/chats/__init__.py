"""Fine-tuning data: rows of chats, where they come from, and how more are made of them."""
