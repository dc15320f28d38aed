// A model in the browser: loads megalodon.wasm and the weights, reads and writes bytes, and shows what the model
// remembers. The functions of web.c have the same names without web_.

const DECODE = {
    F32: (bytes) => new Float32Array(bytes.slice().buffer),
    BF16: (bytes) => { // the upper half of a float
        const half = new Uint16Array(bytes.slice().buffer), whole = new Uint32Array(half.length);
        half.forEach((x, i) => { whole[i] = x << 16; });
        return new Float32Array(whole.buffer);
    },
};

// A file's tensors by name, and its configuration as JSON text. Throws an Error that says what is wrong with the file.
function readSafetensors(buffer) {
    if (buffer.byteLength < 8) throw new Error("the file is cut short: it has no header");
    const length = Number(new DataView(buffer).getBigUint64(0, true)), start = 8 + length;
    if (start > buffer.byteLength) throw new Error("the file is cut short, or no safetensors file");
    let header;
    try {
        header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    } catch {
        throw new Error("no safetensors file: its header is no JSON");
    }
    if (!header.__metadata__ || !header.__metadata__.config) throw new Error("the file has no configuration");
    const tensors = {};
    for (const [name, tensor] of Object.entries(header)) {
        if (name === "__metadata__") continue;
        const [begin, end] = tensor.data_offsets;
        if (start + end > buffer.byteLength) throw new Error(`the file is cut short in tensor ${name}`);
        tensors[name] = { dtype: tensor.dtype, bytes: new Uint8Array(buffer, start + begin, end - begin) };
    }
    return { tensors, config: header.__metadata__.config };
}

// wasm: bytes of megalodon.wasm; weights: bytes of a model.safetensors.
async function loadModel(wasm, weights) {
    const { tensors, config } = readSafetensors(weights);
    const refuse = new Proxy({}, { get: () => () => 52 }); // WASI's functions: "not supported"
    const { instance } = await WebAssembly.instantiate(wasm, { wasi_snapshot_preview1: refuse });
    const c = instance.exports;
    c._initialize();
    const view = (Type, at, n) => new Type(c.memory.buffer, at, n); // a view is invalid once memory has grown
    const text = (at) => {
        const bytes = new Uint8Array(c.memory.buffer, at);
        return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0)));
    };
    const put = (bytes) => {
        const at = c.web_new(bytes.length + 1);
        view(Uint8Array, at, bytes.length).set(bytes);
        return at;
    };
    const count = c.web_open(put(new TextEncoder().encode(config)));
    if (count === 0) throw new Error(text(c.web_message()));
    for (let i = 0; i < count; i++) {
        const name = text(c.web_tensor_name(i)), size = c.web_tensor_size(i), tensor = tensors[name];
        if (!tensor) throw new Error(`the file has no tensor ${name}`);
        if (!DECODE[tensor.dtype]) throw new Error(`tensor ${name} has type ${tensor.dtype}, not F32 or BF16`);
        const values = DECODE[tensor.dtype](tensor.bytes);
        if (values.length !== size) throw new Error(`tensor ${name} has ${values.length} numbers instead of ${size}`);
        view(Float32Array, c.web_tensor(i), size).set(values);
    }
    if (!c.web_ready()) throw new Error(text(c.web_message()));
    const layers = c.web_layers(), D = c.web_dim(), N = c.web_modes(), G = c.web_groups();
    return {
        layers, dim: D, modes: N, groups: G, chunk: c.web_chunk(),
        reset: () => c.web_reset(),
        count: () => c.web_count(),
        read(bytes) {
            const at = put(bytes);
            c.web_read(at, bytes.length);
            c.free(at);
        },
        next: (seed, temperature, topP) => c.web_next(seed, temperature, topP),
        logits: () => view(Float32Array, c.web_logits(), 256).slice(),
        // TimestepNorm's mean and standard deviation for each group of a layer
        moments(layer) {
            const n = c.web_count() * D / G, mean = view(Float64Array, c.web_mean(layer), G).slice();
            return { mean, deviation: view(Float64Array, c.web_m2(layer), G).map((m2) => Math.sqrt(m2 / Math.max(n, 1))) };
        },
        // |h| of each mode of a layer, (N,D)
        memory(layer) {
            const h = view(Float32Array, c.web_h(layer), 2 * N * D);
            return Float32Array.from({ length: N * D }, (_, i) => Math.hypot(h[i], h[N * D + i]));
        },
        timeConstants(layer) {
            const at = c.web_new(4 * N * D);
            c.web_time_constants(layer, at);
            const out = view(Float32Array, at, N * D).slice();
            c.free(at);
            return out;
        },
        // the last query's probabilities over the keys of its chunk; empty where a chunk has just ended
        attention(layer) {
            const keys = c.web_attention(layer);
            return view(Float32Array, c.web_probabilities(), keys).slice();
        },
    };
}

if (typeof module !== "undefined") module.exports = { loadModel, readSafetensors };
