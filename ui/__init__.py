"""The pages. They speak only HTTP to the API, through the `openai` client; gradio is imported nowhere else."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: without it the page asks the internet
