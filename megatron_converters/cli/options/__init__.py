"""Option groups that several entry points share, and their meaning."""
