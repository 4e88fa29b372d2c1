"""What people look at: the quality-control page, films, stills and tables."""
