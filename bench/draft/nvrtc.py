"""scratch: compile variants with NVRTC, report."""
import ctypes, glob, os, re, sys, time
L='NVRTC/'
ctypes.CDLL(L+'libnvrtc-builtins.so.12.9', ctypes.RTLD_GLOBAL)
nv=ctypes.CDLL(L+'libnvrtc.so.12')
SRC=os.environ.get('SRC','src')
def headers():
    out={}
    for f in glob.glob(SRC+'/cuda/**/*',recursive=True):
        if os.path.isfile(f): out[os.path.relpath(f,SRC)]=open(f).read()
    return out
def compile(consts, T='bf16', arch='sm_90', extra=()):
    hs=headers()
    row='\n'.join(f'  static constexpr int {k} = {v};' for k,v in consts.items())
    src=f'''#include "cuda/sm80/forward.cuh"
struct Row {{
  using T = anyflash::{T};
{row}
}};
extern "C" __global__ void __launch_bounds__(32 * Row::warps, Row::blocks_per_sm) kernel(const __grid_constant__ anyflash::ForwardParams p) {{ anyflash::sm80::forward<Row>(p); }}
'''
    n=len(hs); names=(ctypes.c_char_p*n)(*[k.encode() for k in hs]); txt=(ctypes.c_char_p*n)(*[v.encode() for v in hs.values()])
    prog=ctypes.c_void_p()
    assert nv.nvrtcCreateProgram(ctypes.byref(prog), src.encode(), b'k.cu', n, txt, names)==0
    opts=['--std=c++20','-default-device',f'--gpu-architecture={arch}','--ptxas-options=-v',*extra]
    t=time.time()
    r=nv.nvrtcCompileProgram(prog,len(opts),(ctypes.c_char_p*len(opts))(*[o.encode() for o in opts]))
    t=time.time()-t
    sz=ctypes.c_size_t(); nv.nvrtcGetProgramLogSize(prog,ctypes.byref(sz)); log=ctypes.create_string_buffer(sz.value); nv.nvrtcGetProgramLog(prog,log); log=log.value.decode()
    if r: return None,log,t
    ptx = arch.startswith('compute')
    (nv.nvrtcGetPTXSize if ptx else nv.nvrtcGetCUBINSize)(prog,ctypes.byref(sz)); b=ctypes.create_string_buffer(sz.value); (nv.nvrtcGetPTX if ptx else nv.nvrtcGetCUBIN)(prog,b)
    return b.raw,log,t
def report(log):
    m=re.search(r'Used (\d+) registers',log); sp=re.search(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads',log)
    w=[l for l in log.splitlines() if 'C7' in l or 'warning' in l]
    return f"regs {m and m.group(1)} stack {sp and sp.group(1)} spills {sp and sp.group(2)}/{sp and sp.group(3)} {w}"
def C(d,Br,Bc,warps,bps,ks,vs,qreg,general=0,dv=None,**k): return dict(d=d,dv=dv or d,Br=Br,Bc=Bc,warps=warps,blocks_per_sm=bps,k_stages=ks,v_stages=vs,q_in_registers=qreg,general=general,**k)
if __name__=='__main__':
    for c in (C(128,128,64,4,2,2,2,0),C(128,128,64,4,2,2,1,0),C(128,64,64,4,3,1,1,1),C(64,128,64,4,2,2,2,1),C(64,128,64,4,2,2,2,0),C(64,64,64,4,4,2,2,1),C(256,128,64,8,1,2,2,0),C(256,64,64,4,2,1,1,0),C(128,128,64,4,2,2,2,0,1),C(32,128,64,4,2,2,2,0),C(96,128,64,4,2,2,2,0)):
        b,log,t=compile(c)
        print(c, f'{t:.1f}s', report(log) if b else log[:3000], b and len(b))
        if b: open('k.cubin','wb').write(b)
        if not b: break
