//! Generates the protobuf messages and the ttrpc and gRPC stubs from `proto/`,
//! with parsers in pure Rust, so that no machine needs `protoc`.
//!
//! Everything lands in `$OUT_DIR/proto`, with a `mod.rs` that `src/proto.rs`
//! includes. The gRPC stubs are made for the host's side only.

#![allow(clippy::disallowed_macros)] // Cargo reads what this prints.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// What both sides speak: host and guest agent.
const AGENT: [&str; 4] = ["types.proto", "oci.proto", "health.proto", "agent.proto"];
/// What only the host's side speaks.
#[cfg(feature = "host")]
const HOST: [&str; 2] = ["cache.proto", "control.proto"];
/// Of the former, what agents of Kata 1.x speak over gRPC instead of ttrpc.
#[cfg(feature = "host")]
const AGENT_1: [&str; 2] = ["health.proto", "agent.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR")?).join("proto");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out)?;

    let mut modules: Vec<String> = Vec::new();
    let inputs: Vec<PathBuf> = AGENT.iter().map(|f| Path::new("proto").join(f)).collect();
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .include("proto")
        .inputs(&inputs)
        .rust_protobuf()
        .run()?;
    modules.extend(AGENT.iter().map(|f| f.trim_end_matches(".proto").to_string()));
    modules.extend(["agent_ttrpc".to_string(), "health_ttrpc".to_string()]);

    #[cfg(feature = "host")]
    modules.extend(grpc(&out)?);

    // `super::empty` is the path by which generated code names the type.
    let mut list = String::from("pub use protobuf::well_known_types::empty;\n");
    for m in modules {
        list.push_str(&format!(
            "#[allow(missing_docs, clippy::all, renamed_and_removed_lints)]\npub mod {m};\n"
        ));
    }
    fs::write(out.join("mod.rs"), list)?;
    Ok(())
}

/// Messages by protobuf-codegen, stubs by grpcio-compiler. The latter takes
/// descriptors of protobuf 2: the same bytes, parsed once more.
#[cfg(feature = "host")]
fn grpc(out: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    use protobuf::Message as _;
    use protobuf2::Message as _;

    let inputs: Vec<PathBuf> = HOST.iter().map(|f| Path::new("proto").join(f)).collect();
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .inputs(&inputs)
        .out_dir(out)
        .run_from_script();
    let called: Vec<&str> = HOST.into_iter().chain(AGENT_1).collect();
    let parsed = protobuf_parse::Parser::new()
        .pure()
        .include("proto")
        .inputs(called.iter().map(|f| Path::new("proto").join(f)))
        .parse_and_typecheck()?;
    let mut descriptors = Vec::new();
    for d in &parsed.file_descriptors {
        descriptors.push(protobuf2::descriptor::FileDescriptorProto::parse_from_bytes(
            &d.write_to_bytes()?,
        )?);
    }
    let names: Vec<String> = called.iter().map(|f| f.to_string()).collect();
    let mut modules: Vec<String> =
        HOST.iter().map(|f| f.trim_end_matches(".proto").to_string()).collect();
    for file in grpcio_compiler::codegen::gen(&descriptors, &names) {
        fs::write(out.join(&file.name), &file.content)?;
        modules.push(file.name.trim_end_matches(".rs").to_string());
    }
    Ok(modules)
}
