"""How a question is answered: its prompt is read, a strategy plans, and the plan is written."""
