"""Pictures of results: what is drawn, in one look for screens and for papers."""
