"""Builds, opens and saves students and teachers, and reads their preprocessing and features."""
