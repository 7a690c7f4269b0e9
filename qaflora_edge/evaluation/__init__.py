"""Whether a mix helps: asking tasks, scoring answers, and what may be concluded."""
