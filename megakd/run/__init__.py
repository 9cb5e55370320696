"""A whole run: the lab, its stages, the finished folder."""
