"""The embedded corpus of gettext catalogs, and the languages it is in."""
