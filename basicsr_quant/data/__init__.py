"""Data: making low-resolution images; BasicSR's own data sets do the rest."""
