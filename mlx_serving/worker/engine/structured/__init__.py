"""What an output has to be and what it is: grammars, reasoning, tool calls."""
