"What experiments share to compare systems fairly: the same rows, paired differences, intervals"
