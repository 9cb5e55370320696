"""Who answers and who writes texts: frozen models, caches of answers, servers, rollouts."""
