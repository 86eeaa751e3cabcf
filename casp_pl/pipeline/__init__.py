"""The order of the stages, resume, and what each command does."""
