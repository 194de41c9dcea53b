"""Formats: bytes and strings ⇄ tensor specs. One file a format; none of them opens a file or knows where bytes are."""
