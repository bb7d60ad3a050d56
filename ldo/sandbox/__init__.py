"""A procedural 2-D world in which every claim of LDO can be checked by arithmetic."""
