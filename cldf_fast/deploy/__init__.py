"""Deployment: networks exported to engine directories, sealed against any change, and predictions from them."""
