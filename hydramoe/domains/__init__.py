"Prompts become vectors, vectors become domains, and domains get names"
