//! Debian's own kernel under qemu's emulation: slow, and the proof that an unmodified distribution will do.
//!
//! Kernel and, unless it is installed, qemu are unpacked from Debian's packages into the cache. The first file system
//! holds busybox and the kernel's modules that are wanted, loads them, and goes on to this machine's `/` over 9p, where
//! `guest` takes over.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::launch::{Guest, warded};
use super::{cache, debian, guest};

/// Debian's kernel, newest name first: that of Debian 12 comes as a security update.
const PACKAGES: &[&str] = &["linux-image-6.12-amd64", "linux-image-amd64"];
/// Needed to reach the machine's files, then for the tests. One that is built in is left out.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "nbd",
    "ublk_drv",
    "fuse",
    "loop",
    "crc32c_generic",
    "ext4",
];
const QEMU: &str = "qemu-system-x86_64";
const QEMU_PACKAGE: &str = "qemu-system-x86";
/// How a kernel is packed, and what unpacks it.
const PACKINGS: &[(&[u8], &[&str])] = &[
    (b"\x28\xb5\x2f\xfd", &["zstd", "-dc"]),
    (b"\xfd7zXZ\0", &["xz", "-dc"]),
    (b"\x1f\x8b\x08", &["gzip", "-dc"]),
];

/// A kernel that is there, and qemu.
#[derive(Debug)]
pub(crate) struct Kernel {
    version: String,
    image: PathBuf,
    first: PathBuf,
    qemu: Qemu,
}

#[derive(Debug)]
struct Qemu {
    program: PathBuf,
    /// Where it was unpacked, if it is not installed.
    root: Option<PathBuf>,
}

impl Kernel {
    /// Gets everything ready; fetches what is not in the cache.
    pub(super) fn prepare() -> Result<Self, String> {
        if env::consts::ARCH != "x86_64" {
            return Err(format!(
                "no emulated guest on {}: only x86_64",
                env::consts::ARCH
            ));
        }
        for (program, package) in [
            ("busybox", "busybox-static"),
            ("xz", "xz-utils"),
            ("zstd", "zstd"),
        ] {
            if !debian::has_program(program) {
                return Err(format!(
                    "an emulated guest needs {program}: apt-get install {package}"
                ));
            }
        }
        let apt = debian::Apt::of_machine();
        let qemu = Qemu::find(&apt)?;
        let dir = cache()?.join("tcg");
        let version = dir.join("version");
        // Written last: what is there is whole.
        if !version.is_file() {
            unpack(&apt, &dir)?;
        }
        let fail = |error: std::io::Error| format!("{}: {error}", version.display());
        Ok(Kernel {
            version: fs::read_to_string(&version).map_err(fail)?,
            image: dir.join("vmlinux"),
            first: dir.join("first.cpio"),
            qemu,
        })
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "Linux {} of Debian, emulated by {}",
            self.version,
            self.qemu.program.display()
        )
    }

    pub(super) fn command(&self, guest: &Guest<'_>) -> Result<Command, String> {
        let program = env::current_exe().map_err(|error| format!("this program: {error}"))?;
        let mut command = warded(self.qemu.program.as_os_str());
        if let Some(root) = &self.qemu.root {
            let libraries = root.join("usr/lib/x86_64-linux-gnu");
            command.env("LD_LIBRARY_PATH", &libraries);
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
            command.arg("-L").arg(root.join("usr/share/qemu"));
            command.arg("-L").arg(root.join("usr/share/seabios"));
        }
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        command.args([
            "-M",
            "q35,usb=off,vmport=off,sata=off,smbus=off,graphics=off",
        ]);
        command.args(["-accel", "tcg,thread=multi,tb-size=512"]);
        // What is costly to emulate, or slows every change of rings down.
        command.args([
            "-cpu",
            "max,la57=off,smap=off,smep=off,pku=off,pks=off,umip=off",
        ]);
        command.args([
            "-smp",
            &guest.cpus.to_string(),
            "-m",
            &guest.memory.to_string(),
        ]);
        command.arg("-kernel").arg(&self.image);
        command.arg("-initrd").arg(&self.first);
        let mut line = OsString::from(
            "console=ttyS0 quiet panic=-1 nokaslr mitigations=off selinux=0 apparmor=0 audit=0 random.trust_cpu=on \
             tsc=reliable no_timer_check rcupdate.rcu_expedited=1 ulio_init=",
        );
        line.push(&program);
        line.push(" ulio_share=");
        line.push(guest.share);
        command.arg("-append").arg(line);
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        command
            .arg("-chardev")
            .arg(with("file,id=con,path=", guest.console));
        command.args(["-serial", "chardev:con"]);
        for (name, fd) in ["out", "err"].iter().zip(guest.outputs) {
            command.arg("-add-fd").arg(format!("fd={fd},set={fd}"));
            command.args([
                "-chardev",
                &format!("file,id={name},path=/dev/fdset/{fd},append=on"),
            ]);
            command.args([
                "-device",
                &format!("virtserialport,chardev={name},name={name}"),
            ]);
        }
        let mut share = |tag: &str, path: &Path, options: &str| {
            let words = format!("local,id={tag},security_model=none{options},path=");
            command.arg("-fsdev").arg(with(&words, path));
            command.args([
                "-device",
                &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
            ]);
        };
        share("root", Path::new("/"), ",readonly=on,multidevs=remap");
        share("share0", guest.share, "");
        for (index, dir) in guest.writable.iter().enumerate() {
            share(&format!("share{}", index + 1), dir, ",multidevs=remap");
        }
        Ok(command)
    }
}

impl Qemu {
    /// The one that is installed; else one beside the system, since Debian 12's own conflicts with newer
    /// tools of qemu, and nothing that a machine has is to be removed for us.
    fn find(apt: &debian::Apt) -> Result<Self, String> {
        if let Some(program) = debian::program(QEMU) {
            return Ok(Qemu {
                program,
                root: None,
            });
        }
        let root = cache()?.join("qemu");
        let program = root.join("usr/bin").join(QEMU);
        if !program.is_file() {
            let mut packages = apt.missing(QEMU_PACKAGE)?;
            // There in another version, which this one will not do with.
            packages.retain(|name| name != "qemu-utils");
            eprintln!(
                "xtask: fetching {QEMU_PACKAGE} and {} more packages",
                packages.len()
            );
            let half = root.with_extension("half");
            apt.unpack(&packages, &half)?;
            if root.exists() {
                fs::remove_dir_all(&root).map_err(|error| error.to_string())?;
            }
            fs::rename(&half, &root).map_err(|error| format!("{}: {error}", root.display()))?;
        }
        match program.is_file() {
            true => Ok(Qemu {
                program,
                root: Some(root),
            }),
            false => Err(format!("{QEMU_PACKAGE} has no {QEMU}")),
        }
    }
}

/// Fetches the kernel, and makes what qemu starts it from.
fn unpack(apt: &debian::Apt, dir: &Path) -> Result<(), String> {
    let found = PACKAGES.iter().find_map(|package| {
        let names = apt.dependencies(package, "linux-image-").ok()?;
        names.into_iter().next()
    });
    let Some(package) = found else {
        return Err(format!("apt knows none of {}", PACKAGES.join(", ")));
    };
    eprintln!("xtask: fetching {package}");
    let root = dir.join("package");
    apt.unpack(std::slice::from_ref(&package), &root)?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    let write = |name: &str, data: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, data).map_err(|error| format!("{}: {error}", path.display()))
    };
    let image = read(&root.join(format!("boot/vmlinuz-{version}")))?;
    write("vmlinux", &bare(&image, dir)?)?;
    let trees = ["lib/modules", "usr/lib/modules"].map(|tree| root.join(tree).join(&version));
    let tree = trees.iter().find(|tree| tree.is_dir());
    let tree = tree.ok_or_else(|| format!("{package} has no modules"))?;
    write("first.cpio", &first(tree)?)?;
    fs::remove_dir_all(&root).map_err(|error| format!("{}: {error}", root.display()))?;
    write("version", version.as_bytes())
}

/// The kernel out of the file that unpacks itself, which takes an emulated processor seconds.
fn bare(image: &[u8], dir: &Path) -> Result<Vec<u8>, String> {
    let half = dir.join("packed");
    for (magic, unpack) in PACKINGS {
        let places = image.windows(magic.len()).enumerate();
        for (at, _) in places.filter(|(_, window)| window == magic) {
            let fail = |error: std::io::Error| format!("{}: {error}", half.display());
            fs::write(&half, &image[at..]).map_err(fail)?;
            // What follows the packed kernel is an error to them; what they wrote until then is not.
            let mut command = Command::new(unpack[0]);
            command.args(&unpack[1..]).arg("-q");
            let output = command.stdin(fs::File::open(&half).map_err(fail)?).output();
            let output = output.map_err(|error| format!("cannot run {}: {error}", unpack[0]))?;
            if output.stdout.starts_with(b"\x7fELF") {
                fs::remove_file(&half).map_err(fail)?;
                return Ok(output.stdout);
            }
        }
    }
    Err("no kernel was found in vmlinuz".into())
}

/// The first file system: busybox, the modules in the order in which they load, and what loads them.
fn first(tree: &Path) -> Result<Vec<u8>, String> {
    let busybox = debian::program("busybox").ok_or("no busybox")?;
    let mut files = Vec::new();
    find(tree, &mut files)?;
    let mut modules: Vec<(String, Vec<u8>)> = Vec::new();
    for name in MODULES {
        load(name, &files, &mut modules)?;
    }
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "modules", "proc", "root"] {
        archive.directory(dir);
    }
    archive.file("bin/busybox", &read(&busybox)?);
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         b=/bin/busybox\n\
         $b mount -t proc proc /proc\n\
         $b mount -t devtmpfs dev /dev\n",
    );
    for (name, data) in &modules {
        archive.file(&format!("modules/{name}.ko"), data);
        script += &format!("$b insmod /modules/{name}.ko\n");
    }
    // The kernel hands words of its command line that it does not know on as variables.
    script +=
        "$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /root\n";
    script += &format!(
        "$b umount /proc\nexec $b switch_root /root \"$ulio_init\" {} tcg \"$ulio_share\"\n",
        guest::WORD
    );
    archive.file("init", script.as_bytes());
    Ok(archive.finish())
}

/// Adds a module, and before it those that it depends on.
fn load(name: &str, files: &[PathBuf], modules: &mut Vec<(String, Vec<u8>)>) -> Result<(), String> {
    if modules.iter().any(|(there, _)| there == name) {
        return Ok(());
    }
    // A file's name may have a hyphen where the module's has an underscore.
    let is_it = |path: &&PathBuf| {
        let file = path
            .file_name()
            .and_then(|file| file.to_str())
            .unwrap_or("");
        let stem = file.split(".ko").next().unwrap_or("");
        file.contains(".ko") && stem.replace('-', "_") == name.replace('-', "_")
    };
    let Some(path) = files.iter().find(is_it) else {
        return Ok(()); // built in
    };
    let data = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => unpacked("xz", path)?,
        Some("zst") => unpacked("zstd", path)?,
        _ => read(path)?,
    };
    for needed in needs(&data) {
        load(&needed, files, modules)?;
    }
    modules.push((name.to_owned(), data));
    Ok(())
}

/// The modules that a module names as those it depends on (its section .modinfo: strings that end in NUL).
fn needs(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let rest = &module[at + key.len()..];
    let end = rest
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(rest.len());
    let names = String::from_utf8_lossy(&rest[..end]);
    let names = names.split(',').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

fn unpacked(program: &str, path: &Path) -> Result<Vec<u8>, String> {
    let output = Command::new(program).arg("-dc").arg(path).output();
    match output {
        Ok(output) if output.status.success() => Ok(output.stdout),
        _ => Err(format!("{program} cannot unpack {}", path.display())),
    }
}

fn find(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let fail = |error: std::io::Error| format!("{}: {error}", dir.display());
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        match entry.file_type().map_err(fail)?.is_dir() {
            true => find(&entry.path(), files)?,
            false => files.push(entry.path()),
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn with(word: &str, path: &Path) -> OsString {
    let mut word = OsString::from(word);
    word.push(path);
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_depends_on() {
        let names = |text: &[u8]| needs(text);
        assert_eq!(
            names(b"\x7fELF..\0license=GPL\0depends=a,b_c\0retpoline=Y\0"),
            ["a", "b_c"]
        );
        assert!(names(b"..\0depends=\0intree=Y\0").is_empty());
        assert!(names(b"nothing").is_empty());
    }
}
