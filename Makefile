CFLAGS = -O3 -march=native -std=gnu11 -Wall -Wextra -Wshadow -g -fopenmp -fno-math-errno -fno-trapping-math
LDLIBS = -lcjson -lm
train: train.c tokenizer.c model.h adapters.h
	$(CC) $(CFLAGS) train.c tokenizer.c -o $@ $(LDLIBS)
