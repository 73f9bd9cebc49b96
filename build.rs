//! Compiles the public contract in pure Rust (protox: no system protoc) and points the binary at libtorch.

use std::path::PathBuf;

const PROTO: &str = "dreamfeed/v1/dreamfeed.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-env-changed=LIBTORCH");

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_file(PROTO)?;
    let descriptors = compiler.file_descriptor_set();
    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    tonic_prost_build::configure().bytes(".dreamfeed.v1").compile_fds(descriptors)?;
    // For the reflection service. tonic-prost-build writes it only where it runs protoc itself.
    std::fs::write(out_dir.join("dreamfeed.v1.bin"), compiler.encode_file_descriptor_set())?;

    // The binary must find libtorch without help. LD_LIBRARY_PATH still wins: --enable-new-dtags makes this a
    // RUNPATH, which the loader consults after the environment.
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        let lib = std::fs::canonicalize(PathBuf::from(&libtorch).join("lib"))
            .unwrap_or_else(|_| PathBuf::from(libtorch).join("lib"));
        println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{}", lib.display());
    }
    Ok(())
}
