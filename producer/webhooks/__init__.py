"""Webhooks: which URLs are accepted, one attempt, and the deliveries of a process."""
