"""What stands between text and the engine: tokens to text, grammars to masks of tokens."""
