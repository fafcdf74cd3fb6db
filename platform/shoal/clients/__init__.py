"""Programs that speak HTTP to a served model, ours or another: the chat in a terminal, the teacher, the samples."""
