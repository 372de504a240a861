"""HTML pages and SVG charts that need no network and no other file."""
