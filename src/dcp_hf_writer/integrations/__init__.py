"""Specs and options for libraries that define models; each one is imported when it is asked."""
