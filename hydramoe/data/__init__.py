"Instruction data: cards, sources, crafted sets and users' files become one clean set of records"
