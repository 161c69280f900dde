"""Who acts and who trains: engines, chat formats, the token ledger, rollouts, train / eval / view."""
