"""Files and batches, as OpenAI has them: many requests from a file, answered into files, at low priority and with time."""
