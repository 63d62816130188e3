"""Tables of clips, of any kind, as rows."""
