"""An HTTP server of one model, with the API that OpenAI's clients speak."""
