#!/usr/bin/python
# Copyright: the socket_handoff.fleet authors
# SPDX-License-Identifier: Apache-2.0
"""Module systemd_credential: keep an encrypted credential on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_credential
author: socket_handoff.fleet authors (@socket-handoff)
version_added: 0.1.0
short_description: Keep a credential on a host, encrypted by systemd-creds
description:
  - Encrypts a value with C(systemd-creds encrypt) for C(LoadCredentialEncrypted=) of a unit (systemd 250 or newer).
    The value reaches the program by its standard input and is written nowhere in plain text.
  - What is there already is decrypted and compared, so the file changes only when its value or its name does, or when
    the host can no longer decrypt it. It is replaced by rename.
options:
  name:
    description: Name of the credential, as in the unit. The file can be decrypted under no other name.
    type: str
    required: true
  value:
    description: What to encrypt, as UTF-8.
    type: str
    required: true
  path:
    description: Absolute path of the encrypted file, for root alone.
    type: path
    required: true
  key:
    description: >-
      With which key, see C(--with-key=) in systemd-creds(1). V(host) is C(/var/lib/systemd/credential.secret), made
      when it is missing; V(tpm2) binds the file to the machine's TPM.
    type: str
    choices: [auto, host, tpm2, host+tpm2]
    default: auto
attributes:
  check_mode:
    description: Says whether the file would change and changes nothing.
    support: full
  diff_mode:
    description: There is nothing to show that is no secret.
    support: none
"""

EXAMPLES = r"""
- name: Keep the key of the model's provider
  socket_handoff.fleet.systemd_credential:
    name: openai_api_key
    value: "{{ vault_openai_api_key }}"
    path: /etc/streaming-daemon/credentials/openai_api_key.cred
  no_log: true
"""

RETURN = r"""
reason:
  description: Why the file was or would be written.
  type: str
  returned: changed
  sample: it was not there
"""

import os
import subprocess
import tempfile

from ansible.module_utils.basic import AnsibleModule

_PROGRAM = "systemd-creds"


def reason_to_write(module: AnsibleModule, program: str) -> str:
    """Empty where the file holds the value."""
    name, value, path = (module.params[key] for key in ("name", "value", "path"))
    if not os.path.lexists(path):
        return "it was not there"
    if os.path.islink(path) or not os.path.isfile(path):
        module.fail_json(msg=f"{path} is no regular file; allowed is a file, or nothing, at path.")
    done = subprocess.run([program, "decrypt", f"--name={name}", path, "-"], capture_output=True, check=False)
    if done.returncode != 0:
        return "it could not be decrypted here"
    return "" if done.stdout == value.encode() else "its value is another"


def encrypted(module: AnsibleModule, program: str) -> bytes:
    name, value, key = (module.params[option] for option in ("name", "value", "key"))
    command = [program, "encrypt", f"--name={name}", f"--with-key={key}", "-", "-"]
    # Not by run_command, for which a program that gives up before it has read everything is an error without words.
    done = subprocess.run(command, input=value.encode(), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        text = done.stderr.decode("utf-8", "replace").strip()
        module.fail_json(msg=f"{_PROGRAM} cannot encrypt {name} with key={key}: {text}")
    return done.stdout


def write(path: str, data: bytes) -> None:
    """Whole or not at all, and never readable by others."""
    handle, part = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".credential-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
    except OSError:
        os.unlink(part)
        raise


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "value": {"type": "str", "required": True, "no_log": True},
            "path": {"type": "path", "required": True},
            "key": {
                "type": "str",
                "choices": ["auto", "host", "tpm2", "host+tpm2"],
                "default": "auto",
                "no_log": False,
            },
        },
        supports_check_mode=True,
    )
    program = module.get_bin_path(_PROGRAM)
    if program is None:
        module.fail_json(msg=f"{_PROGRAM} is missing: it needs systemd 250 or newer (Debian 12 or newer).")
    path = module.params["path"]
    if not os.path.isdir(os.path.dirname(path)) and not module.check_mode:
        module.fail_json(msg=f"path {path}: its directory does not exist.")
    reason = reason_to_write(module, program)
    if not reason:
        module.exit_json(changed=False)
    if not module.check_mode:
        try:
            write(path, encrypted(module, program))
        except OSError as error:
            module.fail_json(msg=f"path {path} cannot be written: {error.strerror}")
    module.exit_json(changed=True, reason=reason)


if __name__ == "__main__":
    main()
