"""Models as GGUF files, for llama.cpp and what builds on it. Needs the ``gguf`` package (extra ``gguf``)."""
