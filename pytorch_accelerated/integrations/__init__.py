"""One module for each third-party library; import the one you use."""
