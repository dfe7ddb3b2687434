"""Images whose every detail is known: drawn cats and dogs with exact counterfactuals, and real digits."""
