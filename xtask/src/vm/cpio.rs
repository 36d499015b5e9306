//! The archive that a kernel unpacks into its first file system: cpio's "newc" format
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive in the making.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    pub(super) fn directory(&mut self, path: &str) {
        self.entry(path, 0o040_755, &[]);
    }

    /// A file that can be run.
    pub(super) fn file(&mut self, path: &str, data: &[u8]) {
        self.entry(path, 0o100_755, data);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let name_length = path.len() as u32 + 1;
        let links = 1;
        let (nobody, time, device, checksum) = (0, 0, 0, 0);
        let fields = [
            self.inode,
            mode,
            nobody,
            nobody,
            links,
            time,
            data.len() as u32,
            device,
            device,
            device,
            device,
            name_length,
            checksum,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn busybox_unpacks_it() {
        let mut archive = Archive::default();
        archive.directory("dir");
        archive.file("dir/odd", b"12345");
        archive.file("empty", b"");
        let bytes = archive.finish();
        let list = Command::new("busybox")
            .args(["cpio", "-t", "-v"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut list) = list else {
            eprintln!("SKIP busybox_unpacks_it: needs the program busybox");
            return;
        };
        let written = list.stdin.take().map(|mut pipe| pipe.write_all(&bytes));
        assert!(written.is_some_and(|written| written.is_ok()));
        let output = list.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let seen: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let seen: Vec<_> = seen.iter().map(|l| (l[0], l[2], l[l.len() - 1])).collect();
        assert_eq!(
            seen,
            [
                ("drwxr-xr-x", "0", "dir"),
                ("-rwxr-xr-x", "5", "dir/odd"),
                ("-rwxr-xr-x", "0", "empty")
            ]
        );
    }
}
