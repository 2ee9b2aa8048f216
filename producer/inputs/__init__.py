"""Where rows come from: files of prompts, queries; each row checked."""
