"""Systems that fail: at any single call, by losing what was not synced, by changing bits, and used by many at once."""
