"""The one way to write a file or a folder that survives a crash."""
