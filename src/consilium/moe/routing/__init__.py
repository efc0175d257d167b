"""How a token gets its experts: gate, score, select, weigh and chance behind one router."""
