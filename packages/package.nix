# A derivation of nixpkgs, out of the source archive that `make sdist` leaves in dist/:
#     nix-build --expr 'with import <nixpkgs> { }; callPackage ./packages/package.nix { }'
{
  lib,
  python3Packages,
  cmake,
  ninja,
  source ? ../dist,
}:

let
  upstream = lib.importTOML ../patches/UPSTREAM;
  version = lib.head (
    builtins.match ".*__version__ = \"([^\"]+)\".*" (builtins.readFile ../qaflora_edge/__init__.py)
  );

  # The pure-Python binding: what it loads is the library of this package.
  llama-cpp-python = python3Packages.buildPythonPackage {
    pname = upstream.package;
    inherit (upstream) version;
    pyproject = true;
    src = python3Packages.fetchPypi {
      pname = "llama_cpp_python";
      inherit (upstream) version;
      sha256 = upstream.archive_sha256;
    };
    nativeBuildInputs = [
      cmake
      ninja
    ];
    dontUseCmakeConfigure = true;
    env.CMAKE_ARGS = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF";
    build-system = [ python3Packages.scikit-build-core ];
    dependencies = with python3Packages; [
      diskcache
      jinja2
      numpy
      typing-extensions
    ];
    meta.license = lib.licenses.mit;
  };
in
python3Packages.buildPythonApplication {
  pname = "qaflora-edge";
  inherit version;
  pyproject = true;
  src = source + "/qaflora_edge-${version}.tar.gz";
  nativeBuildInputs = [
    cmake
    ninja
  ];
  dontUseCmakeConfigure = true;
  env.CMAKE_ARGS = "-DQAFLORA_EVERY_CPU=on";
  build-system = with python3Packages; [
    filelock
    pip
    platformdirs
    scikit-build-core
  ];
  dependencies = [
    llama-cpp-python
  ]
  ++ (with python3Packages; [
    click
    filelock
    gguf
    h11
    huggingface-hub
    jinja2
    llguidance
    markdown-it-py
    msgspec
    numpy
    platformdirs
    prompt-toolkit
    regex
    rich
    safetensors
    threadpoolctl
    tqdm
    # for `qaflora serve`
    prometheus-client
    pypdf
    starlette
    uvicorn
    uvloop
  ]);
  pythonImportsCheck = [ "qaflora_edge" ];

  meta = {
    description = "Several LoRA adapters at once on a quantised base, weighed anew per query and layer";
    license = lib.licenses.mit;
    mainProgram = "qaflora";
    platforms = lib.platforms.linux;
  };
}
