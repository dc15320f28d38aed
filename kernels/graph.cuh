/*
graph.cuh: the launches of a training step as CUDA graphs.

A launch takes the host 2 to 3 us. A step of a small model has hundreds of kernels that take about as long, so the GPU
waits for the host. But from step to step the same kernels run with the same arguments on the same buffers: only the
contents of the buffers change. So a pass (forward, loss or backward) is recorded once as a graph, and each later step
launches the graph with one call.

    step 1    forward  launch, launch, ...                    the first time in the usual way: libraries get ready
    step 2    forward  record: launch, launch, ... | run      the launches are not executed but kept in a graph
    step 3    forward  run                                    one call

    FAST(graph_ready(m, FORWARD_PASS, usable, 0), graph_launch(FORWARD_PASS));
    ... launches ...
    FAST(graph_records(), graph_finish());

A graph holds pointers and sizes, so it is valid only for the same model, batch, length, and number. `usable` is false
where arguments change from call to call or where the host takes part: with a state, dropout, other ranks. Graphs are
dropped when device memory is freed, since they may refer to it. Required: stream 0 is the thread's own (nvcc's
-default-stream per-thread), as the default one cannot be recorded.
*/
#pragma once

typedef enum { FORWARD_PASS, LOSS_PASS, BACKWARD_PASS, NUM_PASSES } Pass;

static struct {
    const Model *model;
    Dims dims;
    double number; // another argument that the launches depend on
    int runs;      // with these arguments
    cudaGraphExec_t graph;
} passes[NUM_PASSES];
static Pass recording = NUM_PASSES; // the pass whose launches are being recorded; NUM_PASSES: none
static int branching; // it has two branches, see beside.cuh. The loss has one: its parts share the logits' memory
static int beside_open(void);

static void graphs_drop(void) {
    for (int i = 0; i < NUM_PASSES; i++) {
        if (passes[i].graph != NULL) cudaCheck(cudaGraphExecDestroy(passes[i].graph));
    }
    memset(passes, 0, sizeof passes);
}

// Whether there is a graph for these arguments. If not, the second time the launches that follow are recorded.
static int graph_ready(const Model *m, Pass pass, int usable, double number) {
    const Config *c = &m->config;
    const int dropout = m->dropout_on && (c->dropout > 0 || c->hidden_dropout > 0 || c->attention_dropout > 0);
    if (!usable || dropout || m->mode != MEGALODON_TRAIN || m->cp.cp_size > 1) return 0;
    if (passes[pass].model != m || passes[pass].number != number ||
        memcmp(&passes[pass].dims, &m->dims, sizeof m->dims) != 0) {
        if (passes[pass].graph != NULL) cudaCheck(cudaGraphExecDestroy(passes[pass].graph));
        passes[pass] = {m, m->dims, number, 0, NULL};
    }
    if (passes[pass].graph == NULL && passes[pass].runs++ > 0) {
        branching = pass != LOSS_PASS && beside_open();
        cudaCheck(cudaGetLastError()); // of earlier launches
        cudaCheck(cudaStreamBeginCapture(cudaStreamPerThread, cudaStreamCaptureModeThreadLocal));
        recording = pass;
    }
    return passes[pass].graph != NULL;
}

static void graph_launch(Pass pass) { cudaCheck(cudaGraphLaunch(passes[pass].graph, cudaStreamPerThread)); }

static int graph_records(void) { return recording != NUM_PASSES; }

// Makes a graph of what has been recorded, and runs it.
static void graph_finish(void) {
    const Pass pass = recording;
    cudaGraph_t graph;
    recording = NUM_PASSES, branching = 0;
    cudaCheck(cudaStreamEndCapture(cudaStreamPerThread, &graph));
    cudaCheck(cudaGraphInstantiateWithFlags(&passes[pass].graph, graph, 0));
    cudaCheck(cudaGraphDestroy(graph));
    graph_launch(pass);
}
