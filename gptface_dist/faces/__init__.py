"""Captioned faces that need no internet: rendered ones, and the ORL photographs."""
