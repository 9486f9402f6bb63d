"""Packs in folders: one file for each adapter, and one with the coordinates of their factors."""
